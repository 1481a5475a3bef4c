"""Ways from a prototype to what other systems run; none is imported with jaxfl."""
