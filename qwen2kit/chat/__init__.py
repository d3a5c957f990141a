"""A conversation with a model: what is said, what is read again, which tools are called."""
