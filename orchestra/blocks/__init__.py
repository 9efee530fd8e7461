"""See DESIGN section 8; each module says what it owns."""
