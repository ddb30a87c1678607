"""A fleet of machines, simulated with the router's own policies: what ``longctx plan cluster`` asks."""
