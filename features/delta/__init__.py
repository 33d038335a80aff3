"""A user's Delta tables and corank's own: reading, committing, identity of partitions, maintenance."""
