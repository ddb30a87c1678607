"""Ray: worker actors, router, HTTP endpoint and their start and stop."""
