"""From log partitions to the sample table and the states it is folded from."""
