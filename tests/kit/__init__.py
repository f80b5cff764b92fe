"""What tests are made of, and no test: oracle, judge, generator, cases, inputs."""
