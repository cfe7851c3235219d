"""Features of images in which sets of images are compared, each network in a module of its own."""
