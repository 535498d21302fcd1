"""The patched KVM: kernel series, packages, the build, loading, and KVM's selftests."""
