"""The stages of a run as plain functions in one process, each resumable."""
