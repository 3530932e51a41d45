"""What a joint run will need and how long it will take, told before anyone pays: arithmetic alone, no weights."""
