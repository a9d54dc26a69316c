"""The run folder: log, report, model card."""
