"""Floor 1: who is there, what each says of itself, who leads, and how nodes prove who they are."""
