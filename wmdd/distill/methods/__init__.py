"""The methods: where images start, what they are optimized against, which labels they carry."""
