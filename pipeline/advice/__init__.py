"""What `referral advise` asks of a run: levers, the pilots that try them, and their stages."""
