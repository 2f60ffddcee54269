//! The generated code is what the .proto files say. `make proto` writes it; the test compares.

use prost::Message;

use crate::repository;

const FILES: [&str; 3] = ["quarrel/v1/command.proto", "quarrel/v1/job.proto", "quarrel/v1/report.proto"];

#[test]
fn checked_in_code_is_what_the_proto_files_generate() {
    let root = &repository().join("proto");
    let fresh = repository().join("target/tmp/generated");
    std::fs::create_dir_all(&fresh).unwrap();
    let descriptors = protox::compile(FILES.map(|file| root.join(file)), [root]).unwrap();
    std::fs::write(fresh.join("descriptor_set.bin"), descriptors.encode_to_vec()).unwrap();
    prost_build::Config::new().out_dir(&fresh).compile_fds(descriptors).unwrap();

    let checked_in = root.join("src/generated");
    for name in ["quarrel.v1.rs", "descriptor_set.bin"] {
        let made = std::fs::read(fresh.join(name)).unwrap();
        if std::env::var_os("QUARREL_REGENERATE").is_some() {
            std::fs::write(checked_in.join(name), &made).unwrap();
        }
        let kept = std::fs::read(checked_in.join(name)).unwrap();
        assert!(made == kept, "{name} is stale: run `make proto`");
    }
}
