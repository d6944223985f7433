"""Where things come from: `lumi verify` follows the recorded hashes."""
