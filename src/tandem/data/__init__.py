"""Rows in: prompts, preferences and worked examples, from files or the hub, each row checked and none skipped."""
