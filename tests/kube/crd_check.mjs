// Compares objects of CRDs (a JSON array at standard input) with what their makers' schemas ask for: a line for each fault, and one for each kind
// that was compared. Run in the folder of the packages (kube_tools.crd_models).
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "cert-manager.io": "cert-manager",
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};
const find = createRequire(process.cwd() + "/");
for (const each of JSON.parse(readFileSync(0, "utf8"))) {
  const name = PACKAGES[each.apiVersion.split("/")[0]];
  const root = find.resolve.paths("x")[0] + "/@kubernetes-models/" + name + "/" + each.apiVersion + "/index.js";
  const models = await import(pathToFileURL(root));
  try {
    if (!models[each.kind]) throw new Error("there is no such kind");
    new models[each.kind](each).validate();
    console.log("compared " + each.kind);
  } catch (error) {
    console.log("fault " + each.kind + " " + each.metadata.name + ": " + error.message);
  }
}
