"""The engine of every operation: which rows it reads, who holds them, one exchange, torch's own operator."""
