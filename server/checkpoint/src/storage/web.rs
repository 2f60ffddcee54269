//! What TLS trusts.

/// Says once which library does the arithmetic of TLS: rustls has two and takes neither by itself.
pub(super) fn trust() {
    // Somebody else in this process may have said it before: that is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
