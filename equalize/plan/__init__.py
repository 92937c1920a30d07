"""Sites and moments to edits of weights, and those carried out."""
