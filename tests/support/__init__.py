"""What tests build on: tiny networks, data, servers on loopback."""
