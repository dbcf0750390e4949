"""The config of a run: schema, presets, TOML files and fingerprints."""
