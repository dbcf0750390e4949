"""What a run is: the config's schema, its presets and files, and the fingerprints that follow from it."""
