"""Images through the network: mean and spread of each branch."""
