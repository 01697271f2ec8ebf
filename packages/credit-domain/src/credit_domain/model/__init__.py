"""What is known of a model before it runs on ranks: rules by type, shapes, granularity, traffic, saved names."""
