"""What small pilots say of the levers that a generalist has, before one is paid for.  No torch."""
