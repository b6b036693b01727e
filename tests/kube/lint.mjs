// Looks at objects of Kubernetes (a JSON object of arrays by name, at standard input) by all rules that need nothing but the objects, and writes what it
// finds: a JSON array of [name of the array, rule, where]. Run in the folder of the package (kube_tools.linter).
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const PLUGINS = ["practices", "pod-security-standards", "resource-links"];
const given = JSON.parse(readFileSync(0, "utf8"));
const root = createRequire(process.cwd() + "/").resolve.paths("x")[0] + "/@monokle/validation/lib/node.js";
const { createDefaultMonokleValidator } = await import(pathToFileURL(root));
const found = [];
for (const [name, objects] of Object.entries(given)) {
  const validator = createDefaultMonokleValidator();
  const plugins = { "kubernetes-schema": false, "yaml-syntax": false, ...Object.fromEntries(PLUGINS.map((each) => [each, true])) };
  await validator.preload({ plugins });
  const rules = {};  // those that are off where nobody asks, too
  for (const plugin of validator.getPlugins())
    if (PLUGINS.includes(plugin.name)) for (const rule of plugin.rules) rules[plugin.name + "/" + rule.name] = "err";
  await validator.preload({ plugins, rules });
  const resources = objects.map((content, at) => ({
    id: String(at), fileId: String(at), filePath: at + ".json", fileOffset: 0, name: content.metadata.name,
    apiVersion: content.apiVersion, kind: content.kind, namespace: "serving", content, text: JSON.stringify(content),
  }));
  for (const run of (await validator.validate({ resources })).runs)
    for (const each of run.results)
      found.push([name, each.ruleId, each.locations.map((at) => at.logicalLocations?.[0]?.fullyQualifiedName ?? "").join("")]);
}
console.log(JSON.stringify(found));
