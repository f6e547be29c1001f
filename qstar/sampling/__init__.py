"""Rules that draw from a target with a draft's help, and the enumeration that proves them."""
