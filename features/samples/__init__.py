"""Reading the sample table: for training, for export, for statistics."""
