"""What was measured: records, their files, provenance and statistics."""
