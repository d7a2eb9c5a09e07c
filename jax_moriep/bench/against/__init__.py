"""What the package is compared with: floors that nothing can be faster than, and what others have made."""
