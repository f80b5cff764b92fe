"""Other libraries' models on qkv: `import qkv.integrations.transformers`."""
