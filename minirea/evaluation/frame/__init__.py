"""What every evaluation is made of: tasks, cells, records, pictures, and the runner that brings them together."""
