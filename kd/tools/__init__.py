"""Pictures, tables and measurements."""
