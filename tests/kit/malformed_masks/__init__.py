"""What a user might write for a mask by mistake: (the text, the type of the error, its message)."""
