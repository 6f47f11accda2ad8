"""The engine's arithmetic on a CPU: C++ behind a C interface, built on first use; see docs/engine.md."""
