"""Store a run in one SQLite file: schema, one writer, any number of readers, queries."""
