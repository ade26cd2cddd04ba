"""How a chunk is generated: noise schedules and samplers, which know no network."""
