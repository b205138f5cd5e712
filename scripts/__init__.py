"""One command per file: a Config dataclass and main(config)."""
