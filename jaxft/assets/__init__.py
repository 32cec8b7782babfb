"""What ships with the package: the embedded model `nano`, and `build`, which remakes its tokenizer."""
