"""The ledger: one signed, hash-chained receipt for every request, kept in SQLite. docs/ledger.md is its format."""
