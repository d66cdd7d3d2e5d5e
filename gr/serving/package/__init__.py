"""The folder that is served: its records, its writer, a version opened, and who follows it."""
