"""Pictures: from pixels and a prompt to what a sighted program takes."""
