"""One run on disk: its folder, its partition into blocks, the distilled set, progress and status."""
