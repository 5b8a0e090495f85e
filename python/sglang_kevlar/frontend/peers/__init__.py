"""Other frontends of the same groups: each keeps what the others would need to go on with its kept requests."""
