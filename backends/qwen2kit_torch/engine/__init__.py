"""Generation on slots: storage, passes over them, and what is done with their logits."""
