"""What is computed: sizes and their names, data that any process can make, and what must come out of it."""
