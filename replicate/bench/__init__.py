"""Measurements; a benchmark is a module with KIND, `config`, `run(config) -> Record` and `table(record)`."""
