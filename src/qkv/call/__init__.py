"""One call as data: its arguments checked, its problem, its keys, and cache views."""
