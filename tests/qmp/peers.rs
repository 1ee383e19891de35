//! Clients that others have written, unchanged.

use std::process::Command;

use crate::client::{Served, Which};

/// The asyncio client of QEMU's own Python packages, through the life of a node.
const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main(path):
    client = QMPClient('test')
    await client.connect(path)
    await client.execute('blockdev-add', {'driver': 'null-co', 'node-name': 'n', 'size': 1 << 20})
    await client.execute('blockdev-add', {'driver': 'raw', 'node-name': 'r', 'file': 'n'})
    nodes = await client.execute('query-named-block-nodes')
    assert sorted(node['node-name'] for node in nodes) == ['n', 'r'], nodes
    await client.execute('blockdev-reopen', {'options': [
        {'driver': 'raw', 'node-name': 'r', 'file': 'n', 'read-only': True}]})
    try:
        await client.execute('blockdev-del', {'node-name': 'none'})
        assert False
    except ExecuteError as error:
        assert error.error_class == 'GenericError', error
    assert any(command['name'] == 'quit' for command in await client.execute('query-commands'))
    await client.execute('blockdev-del', {'node-name': 'r'})
    await client.execute('blockdev-del', {'node-name': 'n'})
    await client.execute('quit')
    await client.disconnect()

asyncio.run(main(sys.argv[1]))
"#;

#[test]
fn qemus_python_client_drives_it_unchanged() {
    let served = Served::start(Which::Ours, &[]);
    let output = Command::new("python3")
        .args(["-c", SCRIPT])
        .arg(served.socket())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{said}\n(scripts/deps tools installs the package, and target/testdeps/env says where)"
    );
    assert!(served.wait().success());
}
