{{/* What belongs together, in sentences; types, names and bounds are values.schema.json's matter. */}}
{{- define "baton.checks" -}}
{{- with .Values.model }}
{{- if and (eq .source "pvc") (not .pvc.claimName) }}{{ fail "model.source is pvc: name the claim that holds the checkpoint in model.pvc.claimName" }}{{ end }}
{{- if and (eq .source "hostPath") (not (hasPrefix "/" .hostPath.path)) }}{{ fail "model.source is hostPath: name the folder of the nodes in model.hostPath.path, from / on" }}{{ end }}
{{- if and (eq .source "imageVolume") (not .imageVolume.reference) }}{{ fail "model.source is imageVolume: name the image that holds the checkpoint in model.imageVolume.reference" }}{{ end }}
{{- if and (eq .source "download") (ne (len (splitList "/" .download.repository)) 2) }}{{ fail "model.source is download: name what to download in model.download.repository, such as baidu/ERNIE-4.5-0.3B-PT" }}{{ end }}
{{- end }}
{{- if and (eq .Values.model.source "imageVolume") (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) }}{{ fail "model.source imageVolume needs Kubernetes 1.33 (1.31 with the feature gate ImageVolume)" }}{{ end }}
{{- if and (eq .Values.tls.source "existing") (not .Values.tls.existingSecret) }}{{ fail "tls.source is existing: name the Secret with the authority in tls.existingSecret" }}{{ end }}
{{- if and .Values.tenants.existingSecret .Values.tenants.settings }}{{ fail "tenants.existingSecret holds the tenants: leave tenants.settings empty, or the Secret out" }}{{ end }}
{{- if and .Values.auth.insecure (include "baton.tenantsName" .) }}{{ fail "auth.insecure serves whoever has no key, and tenants are told apart by their keys: set one of the two" }}{{ end }}
{{- if and (not .Values.redis.enabled) (not .Values.redis.external.host) }}{{ fail "redis.enabled is false: name your Redis in redis.external.host" }}{{ end }}
{{- if and .Values.redis.external.username (not .Values.redis.external.passwordSecret) }}{{ fail "redis.external.username needs redis.external.passwordSecret" }}{{ end }}
{{- if and .Values.redis.external.tls.clientCertificate (not .Values.redis.external.tls.secret) }}{{ fail "redis.external.tls.clientCertificate needs redis.external.tls.secret, with tls.crt and tls.key" }}{{ end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}{{ fail "ingress.enabled needs ingress.host" }}{{ end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}{{ fail "httpRoute.enabled needs httpRoute.parentRefs, the gateways that it belongs to" }}{{ end }}
{{- if and .Values.monitoring.podMonitor .Values.networkPolicy.enabled (not .Values.networkPolicy.monitors) }}{{ fail "monitoring.podMonitor: name who may scrape in networkPolicy.monitors, or set networkPolicy.enabled to false" }}{{ end }}
{{- with .Values.routers.autoscaling }}{{ if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}{{ fail "routers.autoscaling.minReplicas is above maxReplicas" }}{{ end }}{{ end }}
{{- $prefills := 0 }}{{- $decodes := 0 }}
{{- range $name, $pool := include "baton.pools" . | fromYaml }}
{{- if ne $pool.role "decode" }}{{ $prefills = add $prefills 1 }}{{ end }}
{{- if ne $pool.role "prefill" }}{{ $decodes = add $decodes 1 }}{{ end }}
{{- if eq $.Values.mode "raycluster" }}
{{- if or (eq $pool.kind "LeaderWorkerSet") (gt (int $pool.podsPerWorker) 1) }}{{ fail (printf "mode raycluster has workers of one pod only: set pools.%s.podsPerWorker to 1 and kind to Deployment, or mode to plain" $name) }}{{ end }}
{{- end }}
{{- if and (eq (int $pool.strategy.maxSurge) 0) (eq (int $pool.strategy.maxUnavailable) 0) }}{{ fail (printf "pools.%s.strategy lets no pod go and none come: set maxSurge or maxUnavailable" $name) }}{{ end }}
{{- if and $pool.hostNetwork $.Values.networkPolicy.enabled (not $.Values.networkPolicy.nodes) }}{{ fail (printf "pools.%s.hostNetwork: NetworkPolicies do not find pods on the nodes' network: give the nodes' addresses in networkPolicy.nodes, or set networkPolicy.enabled to false" $name) }}{{ end }}
{{- if gt (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas) }}{{ fail (printf "pools.%s.autoscaling.minReplicas is above maxReplicas" $name) }}{{ end }}
{{- end }}
{{- if not $prefills }}{{ fail "no pool could prefill: give pools.prefill or pools.mixed a replica" }}{{ end }}
{{- if not $decodes }}{{ fail "no pool could decode: give pools.decode or pools.mixed a replica" }}{{ end }}
{{- end }}
