"""What people give by mistake, as tables: how it is made, and what the one message must say."""
