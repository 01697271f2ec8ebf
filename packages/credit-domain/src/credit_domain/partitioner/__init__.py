"""Any model, operation by operation: a trace at the full shape, and from it this rank's program."""
